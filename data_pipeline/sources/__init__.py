"""Where images and boxes come from."""
