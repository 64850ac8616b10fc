"""Compares selection policies: by simulation, then on a real server at the rates that the simulation found."""
