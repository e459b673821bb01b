"""How large an image may be."""

# Where Pillow begins to warn, at its default settings. In Pillow a pixel takes 4 bytes, a progressive JPEG's
# coefficients 6 more, and a picture that is turned is there twice: less than 1 GB in all.
MAX_PIXELS = 89_478_485

# Of an image file, which is held beside its pixels: an uncompressed RGB picture of so many pixels has as much.
MAX_FILE_BYTES = 256 * 2**20
