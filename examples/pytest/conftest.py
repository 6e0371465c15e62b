# Says that these tests want copies, so that the plugin makes room for them before anything else; it is loaded by itself.
pytest_plugins = "snapfs.testing"
