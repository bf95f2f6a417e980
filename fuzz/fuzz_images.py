"""Fuzz kernel images: parsing, extraction and loading."""

from harness import fuzz

if __name__ == "__main__":
    fuzz("simulated.image_target", "fuzz_images")
