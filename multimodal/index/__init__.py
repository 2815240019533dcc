"""An index of many images or texts: written once, kept up to date, searched in milliseconds."""
