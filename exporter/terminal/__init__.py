"""What commands share: flags, progress and tables, exit codes, ranks."""
