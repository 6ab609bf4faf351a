"""Runs training code at a site: a task in, an update out, through the site's filters."""
