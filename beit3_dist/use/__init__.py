"""Models in use by people: searching folders of images, looking into a model, a page to try it."""
