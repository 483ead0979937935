"""What people look at: the report, pictures, an HTML page."""
