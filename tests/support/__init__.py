"""What tests, and the scripts that do as tests do, share. Import it as `support`."""
