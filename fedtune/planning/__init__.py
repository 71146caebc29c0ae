"""Who is asked, and for what: costs, plans, cohorts."""
