"""Where a run happens: devices, packages, processors, worker processes."""
