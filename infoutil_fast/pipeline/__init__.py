"""From a source to a distilled set on disk, and sets as other projects read them."""
