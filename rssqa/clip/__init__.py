"""Vision-language encoders for remote sensing: reading published weights, purifying captions, training and evaluating CLIP-RS."""
