-- Transactions are numbered through, also in the database that a backup is restored into: the
-- numbers of a new cluster begin anew, and those in the audit log and in cursors must not come again.

CREATE FUNCTION transactions_before() RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN 0::bigint;
COMMENT ON FUNCTION transactions_before() IS 'How many transactions were numbered before the first one of this cluster. A restore says another number here.';

CREATE FUNCTION transactions_lost_from() RETURNS xid8 LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN '0'::xid8;
COMMENT ON FUNCTION transactions_lost_from() IS 'From here to transactions_before() numbers may have been given by a mesh that is lost. A restore says another one here.';

CREATE FUNCTION renumbered(number xid8) RETURNS xid8 LANGUAGE sql IMMUTABLE PARALLEL SAFE
    RETURN (number::text::bigint + transactions_before())::text::xid8;

CREATE FUNCTION transaction_number() RETURNS xid8 LANGUAGE sql STABLE
    RETURN renumbered(pg_current_xact_id());
COMMENT ON FUNCTION transaction_number() IS 'Of the running transaction.';

CREATE FUNCTION transactions_ended() RETURNS xid8 LANGUAGE sql STABLE PARALLEL SAFE
    RETURN renumbered(pg_snapshot_xmin(pg_current_snapshot()));
COMMENT ON FUNCTION transactions_ended() IS 'All transactions below this number have ended.';

CREATE FUNCTION transactions_begun() RETURNS xid8 LANGUAGE sql STABLE PARALLEL SAFE
    RETURN renumbered(pg_snapshot_xmax(pg_current_snapshot()));
COMMENT ON FUNCTION transactions_begun() IS 'No transaction had this number or a higher one when the statement began.';

ALTER TABLE audit_events ALTER COLUMN xid SET DEFAULT transaction_number();
