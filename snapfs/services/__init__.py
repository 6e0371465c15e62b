"""What goes on besides calls: tasks of the snapshotter."""
