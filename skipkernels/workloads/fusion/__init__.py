"""A small fusion classifier of audio and video on generated clips; stands in for TVLT on CMU-MOSEI."""
