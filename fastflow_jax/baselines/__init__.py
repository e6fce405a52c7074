"""The paper's comparisons, each with the interface of FastFlow, see `detector.KINDS`."""
