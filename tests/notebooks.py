"""nbdev_test, whose processes are forked from this one: the library is loaded once.

And what is loaded is frozen: the end of each fold collects garbage, and to look for it among a million
objects of imported modules takes longer than the small folds of these notebooks.
"""
import gc

from nbdev.test import nbdev_test

import biomass_kit.evidence.search  # noqa: F401
import biomass_kit.training.run  # noqa: F401

gc.collect()
gc.freeze()
nbdev_test()
