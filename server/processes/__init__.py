"""What each process is made of: settings become pools, pools services."""
