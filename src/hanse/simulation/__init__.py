"""Server and sites on one machine: the real workflow, cohort, filters and sites, over shared memory instead of a network."""
