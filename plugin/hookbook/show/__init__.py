"""What results look like: pictures, tables, views and pages."""
