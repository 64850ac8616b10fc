"""What every room may use: the machine, files, progress, the console, pictures, reports. Knows no model."""
