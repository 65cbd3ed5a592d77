"""Relatives of MemVP, which put an image into the FFN as well: ADEM-VL and MemVR."""
