"""`claa-sglang explain`: a page that shows of one prompt what was kept, why, and what the answer looked at."""
