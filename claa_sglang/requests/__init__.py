"""What one request wants, is, and reports."""
