"""Policies of modality selection compared: by simulation, then on a real server at the rates that were found."""
