"""jddist inside other trainers; each module needs its own package, named by an extra."""
