"""From images to the features that detectors read, computed once per image."""
