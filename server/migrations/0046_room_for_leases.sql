-- A job is written three times: asked for, leased, ended. What is written first leaves room for the
-- others beside it: a page then logs only what changed, and no leaf is split by its own rows. Four
-- fifths full, most pages had their rows leave for others. What is there already stays as it is.
ALTER TABLE jobs         SET (fillfactor = 50);
ALTER INDEX jobs_pkey    SET (fillfactor = 35);
ALTER INDEX jobs_by_user SET (fillfactor = 35);
