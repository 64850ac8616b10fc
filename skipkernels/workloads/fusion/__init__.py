"""A small fusion classifier of sound and video on generated clips, in the place of TVLT on CMU-MOSEI."""
