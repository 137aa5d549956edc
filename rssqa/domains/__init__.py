"""Other places and sensors: pairs of domains and their common classes, styles, an adapter on a frozen encoder."""
