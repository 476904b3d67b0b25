"""The version of heturun, launcher and library alike."""

VERSION = "0.1.0"
