package main

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/dstm-project/dstm/internal/daemon"
	"github.com/dstm-project/dstm/internal/pki"
	"github.com/dstm-project/dstm/internal/tlsid"
)

func (a *app) pkiCommand() *cobra.Command {
	return group("pki", "Make certificates with the built-in authority", a.pkiInit(), a.pkiIssue(), a.pkiRenew(), a.pkiRevoke())
}

func (a *app) pkiInit() *cobra.Command {
	var dir, domain string
	var valid time.Duration
	cmd := &cobra.Command{
		Use:   "init --trust-domain NAME",
		Short: "Make the root: ca.pem and ca.key",
		Long:  "Make a new root certificate (ca.pem) and its key (ca.key) in --dir. An existing root is never replaced.",
		Args:  noArgs,
		RunE: func(*cobra.Command, []string) error {
			if domain == "" {
				return daemon.Usage(errors.New("--trust-domain is missing, for example --trust-domain example.net"))
			}
			if err := pki.Init(dir, domain, valid); err != nil {
				return err
			}
			return a.printFiles(tlsid.Files{Cert: filepath.Join(dir, "ca.pem"), Key: filepath.Join(dir, "ca.key")})
		},
	}
	cmd.Flags().StringVar(&dir, "dir", ".", "directory of the root")
	cmd.Flags().StringVar(&domain, "trust-domain", "", "`name` that all identities begin with")
	cmd.Flags().DurationVar(&valid, "valid", 10*365*24*time.Hour, "validity of the root")
	return cmd
}

func (a *app) pkiIssue() *cobra.Command {
	var dir, out, cell, role, name string
	var dns, ips []string
	var valid time.Duration
	cmd := &cobra.Command{
		Use:   "issue --role ROLE --name NAME",
		Short: "Make a certificate: NAME.pem and NAME.key",
		Long: "Make a key and a certificate for one identity, signed by the root in --dir. Roles: svc (lease service), " +
			"tep (gateway), resolver (CoreDNS), host (host agent), operator (this tool). A lease service needs --dns or " +
			"--ip, which its callers verify.",
		Args: noArgs,
		RunE: func(*cobra.Command, []string) error {
			o := pki.Options{DNS: dns, Valid: valid}
			for _, s := range ips {
				ip, err := netip.ParseAddr(s)
				if err != nil {
					return daemon.Usage(fmt.Errorf("--ip %q is not an IP address", s))
				}
				o.IPs = append(o.IPs, ip)
			}
			if name == "" {
				return daemon.Usage(errors.New("--name is missing"))
			}
			if !slices.Contains(tlsid.Roles(), tlsid.Role(role)) {
				return daemon.Usage(fmt.Errorf("--role %q is unknown, want one of %v", role, tlsid.Roles()))
			}
			domain, err := trustDomain(dir)
			if err != nil {
				return err
			}
			files, err := pki.Issue(dir, out, tlsid.ID{TrustDomain: domain, Cell: cell, Role: tlsid.Role(role), Name: name}, o)
			if err != nil {
				return err
			}
			return a.printFiles(files)
		},
	}
	f := cmd.Flags()
	f.StringVar(&dir, "dir", ".", "directory of the root")
	f.StringVar(&out, "out", ".", "directory of the certificate")
	f.StringVar(&cell, "cell", "lab", "`name` of the cell")
	f.StringVar(&role, "role", "", "svc, tep, resolver, host or operator")
	f.StringVar(&name, "name", "", "`name` of the holder, and of the files")
	f.StringSliceVar(&dns, "dns", nil, "DNS `name` in the certificate (repeatable)")
	f.StringSliceVar(&ips, "ip", nil, "IP `address` in the certificate (repeatable)")
	f.DurationVar(&valid, "valid", pki.DefaultValid, "validity of the certificate")
	return cmd
}

func (a *app) pkiRenew() *cobra.Command {
	var dir string
	var valid time.Duration
	cmd := &cobra.Command{
		Use:   "renew CERT.pem...",
		Short: "Replace certificates and their keys",
		Long: "Replace certificates of the root in --dir, and the keys beside them, by new ones for the same identities, DNS names " +
			"and addresses. Running daemons take them within 10 seconds and lose no stream.",
		RunE: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return daemon.Usage(errors.New("no certificate to renew, for example tep1.pem"))
			}
			for _, cert := range args {
				files, err := pki.Renew(dir, cert, valid)
				if err != nil {
					return err
				}
				if err := a.printFiles(files); err != nil {
					return err
				}
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&dir, "dir", ".", "directory of the root")
	cmd.Flags().DurationVar(&valid, "valid", pki.DefaultValid, "validity of the certificates")
	return cmd
}

func (a *app) pkiRevoke() *cobra.Command {
	var dir string
	var valid time.Duration
	cmd := &cobra.Command{
		Use:   "revoke [CERT.pem | SERIAL]...",
		Short: "Take certificates back: crl.pem",
		Long: "Add certificates, by their file or their hexadecimal serial number, to the revocation list crl.pem in --dir, which " +
			"daemons read when tls.crl names it. Without an argument the list is renewed.",
		RunE: func(_ *cobra.Command, args []string) error {
			var serials []*big.Int
			for _, arg := range args {
				n, err := serial(arg)
				if err != nil {
					return daemon.Usage(err)
				}
				serials = append(serials, n)
			}
			path, err := pki.Revoke(dir, valid, serials...)
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON("dstm.pki/1", struct {
					CRL string `json:"crl"`
				}{path})
			}
			_, err = fmt.Fprintln(a.out, path)
			return err
		},
	}
	cmd.Flags().StringVar(&dir, "dir", ".", "directory of the root")
	cmd.Flags().DurationVar(&valid, "valid", pki.DefaultCRLValid, "until a newer list is due")
	return cmd
}

// serial reads the serial number of a certificate file, or the number itself.
func serial(arg string) (*big.Int, error) {
	b, err := os.ReadFile(arg)
	if err != nil {
		n, ok := new(big.Int).SetString(arg, 16)
		if !ok {
			return nil, fmt.Errorf("%q is neither a certificate file nor a hexadecimal serial number", arg)
		}
		return n, nil
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, fmt.Errorf("%s holds no PEM block", arg)
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", arg, err)
	}
	return c.SerialNumber, nil
}

// trustDomain reads the name from the root.
func trustDomain(dir string) (string, error) {
	path := filepath.Join(dir, "ca.pem")
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("no root in %s: run dstm pki init first", dir)
	}
	if err != nil {
		return "", err
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return "", fmt.Errorf("%s holds no PEM block", path)
	}
	root, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	if len(root.URIs) != 1 {
		return "", fmt.Errorf("%s names %d trust domains, want one: it was not made by dstm pki init", path, len(root.URIs))
	}
	return root.URIs[0].Host, nil
}

func (a *app) printFiles(f tlsid.Files) error {
	if a.json {
		return a.printJSON("dstm.pki/1", struct {
			Cert string `json:"cert"`
			Key  string `json:"key"`
			CA   string `json:"ca,omitempty"`
		}{f.Cert, f.Key, f.CA})
	}
	_, err := fmt.Fprintf(a.out, "%s\n%s\n", f.Cert, f.Key)
	return err
}
