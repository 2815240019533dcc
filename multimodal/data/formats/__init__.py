"""What the bytes of files are: headers of tars, damage in image files, images in a folder."""
