"""From a mixture to a model: the steps of SFT, in one process or divided among several."""
