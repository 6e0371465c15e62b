pytest_plugins = "snapfs.testing"
