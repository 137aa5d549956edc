"""Looking at features and predictions: projections, figures, pages, the Explorer, widgets, reports."""
