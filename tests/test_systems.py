"""The list of systems promises only what is there: pages, commands and tests exist."""
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rssqa.cli import app
from rssqa.systems import STATES, SYSTEMS

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize('system', SYSTEMS, ids=lambda system: system.name)
def test_what_is_promised_is_there(system):
    assert system.state in STATES and system.paper.startswith(('arXiv', 'doi'))
    if system.state == 'not yet':
        assert not system.page and not system.checked
        return
    assert (ROOT/'nbs'/system.page).exists()
    if system.checked.startswith('tests/'): assert (ROOT/system.checked).exists()
    else: assert CliRunner().invoke(app, [*system.checked.split()[1:], '--help']).exit_code == 0
    if system.state == 'works': assert system.checked.startswith('rssqa ')
