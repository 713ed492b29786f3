"""Tables: columns, layouts of the papers, formats."""
