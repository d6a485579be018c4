"""Video to correspondences: see `prepare`."""
