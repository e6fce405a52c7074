"""The paper's comparisons, each with the interface of FastFlow, see `kinds.KINDS`."""
