"""OpenMoji's colours by names that a prompt can hold."""

import numpy as np

PALETTE = {  # OpenMoji's own (data/color-palette.json), by names
    "black": "000000", "white": "ffffff", "light blue": "92d3f5", "blue": "61b2e4",
    "red": "ea5a47", "dark red": "d22f27", "light green": "b1cc33", "green": "5c9e31",
    "yellow": "fcea2b", "dark yellow": "f1b31c", "light grey": "d0cfce", "grey": "9b9b9a",
    "dark grey": "3f3f3f", "light orange": "f4aa41", "orange": "e27022", "pink": "ffa7c0",
    "dark pink": "e67a94", "light purple": "b399c8", "purple": "8967aa", "brown": "a57939",
    "dark brown": "6a462f", "dark blue": "1e50a0", "maroon": "781e32", "dark green": "186648",
}
PALETTE_RGB = np.array([list(bytes.fromhex(value)) for value in PALETTE.values()], dtype=float)
