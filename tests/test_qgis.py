"""QGIS itself opens what a scene leaves: styles beside their rasters, colours as they are meant, polygons."""
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin

from rssqa.quality.maps import ClassTable
from rssqa.scene.assess_scene import assess_scene
from rssqa.scene.outputs import ERROR_COLOURS, SCALE, write_styles

from test_scene import files                                              # noqa: F401, a fixture

SIDE = 40
OPEN = '''
import json, sys
from qgis.core import QgsApplication, QgsMapRendererSequentialJob, QgsMapSettings, QgsRasterLayer, QgsVectorLayer
from qgis.PyQt.QtCore import QSize
from qgis.PyQt.QtGui import QColor
app = QgsApplication([], False)
app.initQgis()
found = {}
for path in sys.argv[1:]:
    if path.endswith('.gpkg'):
        layer = QgsVectorLayer(path, 'regions', 'ogr')
        fields = [field.name() for field in layer.fields()]
        found[path] = dict(valid=layer.isValid(), crs=layer.crs().authid(), fields=fields, n=layer.featureCount())
        continue
    layer = QgsRasterLayer(path, 'map')
    settings = QgsMapSettings()
    settings.setLayers([layer])
    settings.setExtent(layer.extent())
    settings.setOutputSize(QSize(%d, %d))
    settings.setBackgroundColor(QColor('#0000FF'))
    job = QgsMapRendererSequentialJob(settings)
    job.start()
    job.waitForFinished()
    job.renderedImage().save(path + '.png')
    found[path] = dict(valid=layer.isValid(), renderer=layer.renderer().type(), band=layer.renderer().usesBands())
print('ANSWER' + json.dumps(found))
''' % (SIDE, SIDE)


def python_with_qgis():
    "Find an interpreter that has QGIS; it comes with the system, not from a registry of Python."
    for name in ('/usr/bin/python3', shutil.which('python3')):
        if not name or not Path(name).exists(): continue
        run = subprocess.run([name, '-c', 'import qgis.core'], capture_output=True, env=plain_environment())
        if run.returncode == 0: return name
    return None


def plain_environment():
    kept = {name: value for name, value in os.environ.items() if not name.startswith('PYTHON')}
    return kept | dict(QT_QPA_PLATFORM='offscreen')


@pytest.fixture(scope='module')
def qgis(tmp_path_factory):
    python = python_with_qgis()
    if not python: pytest.skip('no QGIS here: apt-get install python3-qgis')
    home = tmp_path_factory.mktemp('qgis')
    def open_files(*paths):
        environment = plain_environment() | dict(HOME=str(home), XDG_RUNTIME_DIR=str(home))
        command = [python, '-c', OPEN, *map(str, paths)]
        run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        [line] = [line for line in run.stdout.splitlines() if line.startswith('ANSWER')] or [None]
        assert line, run.stderr[-2000:]
        return json.loads(line.removeprefix('ANSWER'))
    return open_files


TABLE = ClassTable(('water', 'land'), (3, 7), ((40, 120, 240), (200, 160, 40)))


def write(path, bands, nodata):
    about = dict(driver='GTiff', height=SIDE, width=SIDE, count=len(bands), dtype='uint8', nodata=nodata)
    about |= dict(crs='EPSG:32633', transform=from_origin(500000, 5500000, 0.5, 0.5))
    with rasterio.open(path, 'w', **about) as f: f.write(np.stack(bands))
    return path


def drawn(path): # (H,W,3) as QGIS shows it
    from PIL import Image
    return np.asarray(Image.open(f'{path}.png').convert('RGB'))


def colour(text): return tuple(int(text[i:i + 2], 16) for i in (1, 3, 5))


def test_styles_beside_rasters_give_the_colours_that_are_meant(qgis, tmp_path):
    columns = np.repeat(np.array([round(SCALE * value) for value, _ in ERROR_COLOURS], np.uint8), SIDE // 5)
    errors = np.tile(columns, (SIDE, 1))
    errors[-8:] = 255
    quality = write(tmp_path/'quality.tif', [np.full((SIDE, SIDE), 50, np.uint8)] * 4 + [errors], 255)
    classes = np.where(np.arange(SIDE) < SIDE // 2, 3, 7).astype(np.uint8)
    fused = write(tmp_path/'fused.tif', [np.tile(classes, (SIDE, 1))], 255)
    write_styles(TABLE, tmp_path)
    found = qgis(quality, fused)
    assert found[str(quality)] == dict(valid=True, renderer='singlebandpseudocolor', band=[5])
    assert found[str(fused)] == dict(valid=True, renderer='paletted', band=[1])
    picture = drawn(quality)
    for i, (_, text) in enumerate(ERROR_COLOURS):
        np.testing.assert_allclose(picture[10, 4 + i * SIDE // 5], colour(text), atol=3)
    assert tuple(picture[-4, 10]) == (0, 0, 255)                                    # no value: the background
    picture = drawn(fused)
    assert tuple(picture[10, 5]) == TABLE.colours[0] and tuple(picture[10, -5]) == TABLE.colours[1]


def test_all_files_of_a_scene_open(qgis, files, tmp_path):
    from test_scene import CLASSES
    assess_scene(files['image'], files['maps'], tmp_path/'out', CLASSES, workers=1)
    rasters = [tmp_path/'out'/name for name in ('quality.tif', 'fused.tif')]
    regions = tmp_path/'out/regions.gpkg'
    found = qgis(*rasters, regions)
    assert all(of_file['valid'] for of_file in found.values())
    assert [found[str(path)]['renderer'] for path in rasters] == ['singlebandpseudocolor', 'paletted']
    assert found[str(regions)]['crs'] == 'EPSG:32633' and found[str(regions)]['n'] > 0
    assert {'best', 'good_oa'} <= set(found[str(regions)]['fields'])
    quality, fused = (drawn(path).reshape(-1, 3) for path in rasters)
    assert not (quality == (0, 0, 255)).all(1).any() and len(np.unique(fused, axis=0)) > 3
