"""What a photo, a table and a fold are: files in, checked rows and pixels out."""
