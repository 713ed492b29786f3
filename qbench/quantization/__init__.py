"""Statistics, calibration and the loop over decoder blocks."""
