"""What people read: one HTML file on a run or on a folder of photos."""
