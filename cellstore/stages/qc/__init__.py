"""Quality control: what is measured of each image, and what is odd on each plate."""
