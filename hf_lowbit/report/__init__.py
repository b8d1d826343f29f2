"""One page about a low-bit checkpoint: ``gather`` looks, ``draw`` draws, ``sections`` tells, ``document`` writes."""
