"""Who may call which method. A method without a row is denied, here and in every Envoy."""

import enum
from collections.abc import Mapping


class Access(enum.Enum):
    """What a caller must show."""

    ANYONE = "anyone"
    """Nothing: callable through the edge without a token, and by every workload of the mesh."""

    USER = "user"
    """A user's access token, verified by edge, sidecar and service."""

    WORKER = "worker"
    """The SPIFFE identity of a worker. Never reachable through the edge."""

    WORKLOAD = "workload"
    """Any SPIFFE identity of the mesh. Never reachable through the edge."""


REFLECTION = "grpc.reflection.v1alpha.ServerReflection"

METHODS: Mapping[str, Access] = {
    "/kimberly.auth.v1.AuthService/SignUp": Access.ANYONE,
    "/kimberly.auth.v1.AuthService/LogIn": Access.ANYONE,
    "/kimberly.auth.v1.AuthService/RefreshToken": Access.ANYONE,
    "/kimberly.auth.v1.AuthService/LogOut": Access.ANYONE,
    "/kimberly.auth.v1.AuthService/GetJwks": Access.ANYONE,
    "/kimberly.users.v1.UserService/GetUser": Access.USER,
    "/kimberly.users.v1.UserService/GetSettings": Access.USER,
    "/kimberly.users.v1.UserService/UpdateSettings": Access.USER,
    "/kimberly.users.v1.UserService/RecordConsent": Access.USER,
    "/kimberly.users.v1.UserService/ListConsents": Access.USER,
    "/kimberly.users.v1.UserService/ListAuditEvents": Access.USER,
    "/kimberly.users.v1.UserService/ListAuditLinks": Access.USER,
    "/kimberly.users.v1.UserService/VerifyAuditLog": Access.USER,
    "/kimberly.billing.v1.BillingService/ListPlans": Access.USER,
    "/kimberly.billing.v1.BillingService/GetSubscription": Access.USER,
    "/kimberly.billing.v1.BillingService/ChangeSubscription": Access.USER,
    "/kimberly.billing.v1.BillingService/ListUsage": Access.USER,
    "/kimberly.privacy.v1.PrivacyService/CreateErasure": Access.USER,
    "/kimberly.privacy.v1.PrivacyService/GetErasure": Access.USER,
    "/kimberly.privacy.v1.PrivacyService/GetErasureReceipt": Access.ANYONE,
    "/kimberly.privacy.v1.PrivacyService/CreateExport": Access.USER,
    "/kimberly.privacy.v1.PrivacyService/GetExport": Access.USER,
    "/kimberly.privacy.v1.PrivacyWorkService/EraseUser": Access.WORKER,
    "/kimberly.privacy.v1.PrivacyWorkService/ExportUser": Access.WORKER,
    "/kimberly.privacy.v1.PrivacyWorkService/ExpireExport": Access.WORKER,
    "/kimberly.memory.v1.MemoryService/CreateMemory": Access.USER,
    "/kimberly.memory.v1.MemoryService/GetMemory": Access.USER,
    "/kimberly.memory.v1.MemoryService/ListMemories": Access.USER,
    "/kimberly.memory.v1.MemoryService/UpdateMemory": Access.USER,
    "/kimberly.memory.v1.MemoryService/DeleteMemory": Access.USER,
    "/kimberly.memory.v1.MemoryService/BatchCreateMemories": Access.USER,
    "/kimberly.memory.v1.MemoryService/ListMemoryVersions": Access.USER,
    "/kimberly.memory.v1.MemoryService/ArchiveMemory": Access.USER,
    "/kimberly.memory.v1.MemoryService/RestoreMemory": Access.USER,
    "/kimberly.memory.v1.MemoryService/ProtectMemory": Access.USER,
    "/kimberly.memory.v1.MemoryService/GiveFeedback": Access.USER,
    "/kimberly.memory.v1.MemoryService/GetUsage": Access.USER,
    "/kimberly.memory.v1.MemoryService/QueryMemories": Access.USER,
    "/kimberly.memory.v1.MemoryService/ImportMemories": Access.USER,
    "/kimberly.memory.v1.MemoryService/GetImport": Access.USER,
    "/kimberly.memory.v1.MemoryService/ExportMemories": Access.USER,
    "/kimberly.memory.v1.MemoryService/WatchMemories": Access.USER,
    "/kimberly.memory.v1.MemoryService/UploadEmbeddings": Access.USER,
    "/kimberly.memory.v1.MemoryService/DeleteEmbeddings": Access.USER,
    "/kimberly.memory.v1.MemoryService/CreateAttachment": Access.USER,
    "/kimberly.memory.v1.MemoryService/CompleteAttachment": Access.USER,
    "/kimberly.memory.v1.MemoryService/GetAttachment": Access.USER,
    "/kimberly.memory.v1.MemoryService/ListAttachments": Access.USER,
    "/kimberly.memory.v1.MemoryService/DeleteAttachment": Access.USER,
    "/kimberly.memory.v1.MemoryService/AppendToSession": Access.USER,
    "/kimberly.memory.v1.MemoryService/EndSession": Access.USER,
    "/kimberly.memory.v1.MemoryService/GetTranscript": Access.USER,
    "/kimberly.memory.v1.MemoryService/DeleteTranscript": Access.USER,
    "/kimberly.memory.v1.MemoryService/Meditate": Access.USER,
    "/kimberly.memory.v1.MemoryService/GetMeditation": Access.USER,
    "/kimberly.scoring.v1.ScoringService/PlanMeditation": Access.WORKER,
    "/kimberly.scoring.v1.ScoringService/Score": Access.WORKER,
    "/kimberly.embedding.v1.EmbeddingService/Embed": Access.WORKER,
    "/kimberly.maintenance.v1.MaintenanceService/SweepMemories": Access.WORKER,
    "/kimberly.maintenance.v1.MaintenanceService/RewrapDataKeys": Access.WORKER,
    "/kimberly.maintenance.v1.MaintenanceService/ReindexMemories": Access.WORKER,
    "/kimberly.maintenance.v1.MaintenanceService/PromoteShortTerm": Access.WORKER,
    "/kimberly.maintenance.v1.MaintenanceService/SweepAttachments": Access.WORKER,
    "/kimberly.jobs.v1.JobService/GetJob": Access.USER,
    "/kimberly.jobs.v1.JobService/ListJobs": Access.USER,
    "/kimberly.jobs.v1.WorkerService/Work": Access.WORKER,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Access.USER,
    "/grpc.health.v1.Health/Check": Access.WORKLOAD,
}

OPEN_TO_ERASED = frozenset(
    {
        "/kimberly.privacy.v1.PrivacyService/CreateErasure",
        "/kimberly.privacy.v1.PrivacyService/GetErasure",
    }
)
"""What a user who is being erased may still call: to ask again is to be told the same."""

PROCESSES: Mapping[str, tuple[str, ...]] = {
    "auth": (
        "kimberly.auth.v1.AuthService",
        "kimberly.users.v1.UserService",
        "kimberly.privacy.v1.PrivacyService",
        "kimberly.billing.v1.BillingService",
        REFLECTION,
    ),
    "memory": (
        "kimberly.memory.v1.MemoryService",
        "kimberly.scoring.v1.ScoringService",
        "kimberly.embedding.v1.EmbeddingService",
        "kimberly.maintenance.v1.MaintenanceService",
        "kimberly.privacy.v1.PrivacyWorkService",
    ),
    "jobs": ("kimberly.jobs.v1.JobService", "kimberly.jobs.v1.WorkerService"),
}
"""Which process serves which services. The auth process answers reflection for all of them."""

EDGE = "edge"
WORKER = "worker"


def methods_of(process: str) -> dict[str, Access]:
    """Return the methods that one process serves, health included."""
    prefixes = (*PROCESSES[process], "grpc.health.v1.Health")
    return {
        method: access for method, access in METHODS.items() if method.split("/")[1] in prefixes
    }


def public_services() -> list[str]:
    """Return the services that users may call through the edge, reflection left out."""
    public = {Access.ANYONE, Access.USER}
    return sorted(
        {method.split("/")[1] for method, access in METHODS.items() if access in public}
        - {REFLECTION}
    )


def spiffe_id(trust_domain: str, namespace: str, process: str) -> str:
    """Return the SPIFFE identity of a process, such as spiffe://kimberly.local/ns/prod/sa/auth."""
    return f"spiffe://{trust_domain}/ns/{namespace}/sa/{process}"
