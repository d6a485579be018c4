"""Textures for frames of known motion."""

import cv2
import numpy as np


def texture(size, seed=0):
    """Smooth random colours `(h, w, 3)` uint8 that cover the whole range."""
    noise = np.random.default_rng(seed).uniform(0, 255, (*size, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 1.5)
    return cv2.normalize(smooth, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)
