"""The ways in for fleets: a verdict in a fleet's own terms, and runs on many machines."""
