"""Small generated datasets and corpora with the layouts of the real ones, and a browser: what tests and lessons of several packages share."""
