"""Scenes of any size: windows, cells, rasters, regions and the accuracy card."""
