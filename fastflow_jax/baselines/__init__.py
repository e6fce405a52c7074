"""Detectors of other papers, behind the same seam as FastFlow: see `detector.KINDS`."""
